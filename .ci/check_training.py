"""The newest run of the main job has learned to read: its figures against what the README's first command promises."""

import json
from pathlib import Path

newest = max(Path("runs").glob("*/summary.json"), key=lambda path: path.stat().st_mtime)
figures = json.loads(newest.read_text(encoding="utf-8"))
bits, without = figures["held_out_bits_per_byte"], figures["without_experts_bits_per_byte"]
print(f"{newest}: {bits:.3f} bits per byte, {without:.3f} with all experts zeroed")
if bits > 2.8:
    raise SystemExit(f"held-out text costs {bits:.3f} bits per byte, at most 2.8 expected")
if without < bits + 0.3:
    raise SystemExit(f"zeroing the experts costs only {without - bits:.3f} bits per byte: they are hardly used")
if not (newest.parent / "training.png").stat().st_size > 10_000:
    raise SystemExit("training.png is missing or empty")
