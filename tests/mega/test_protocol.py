"""comm/*.cuh, the kernel's own headers, compiled for the CPU: under a scheduler that looks for the worst order, and
under ThreadSanitizer. Then with faults planted in them, each of which has to be found.

What it shows: order of signals and waits, happens-before with the GPU's scopes, how waits end. What it cannot show: the
PTX behind each access, and a relaxed load that returns an old value.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from megamoe.kernels.jit.source import INCLUDE_ROOT

HERE = Path(__file__).parent
COMM = Path("megamoe/comm")
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the protocol for the CPU")


def compile_(name: str, folder: Path, include: Path = INCLUDE_ROOT, *flags: str) -> Path:
    binary = folder / name
    command = ["g++", "-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", *flags, f"-I{include}"]
    done = subprocess.run(
        [*command, str(HERE / "protocol" / f"{name}.cpp"), "-o", str(binary)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return binary


def run(*command: str | Path | int) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, timeout=200)


def totals(*command: str | Path | int) -> dict[str, int]:
    done = run(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: int(count) for count, name in re.findall(r"(\d+) ([a-z-]+)", done.stdout)}


@pytest.fixture(scope="module")
def explore(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_("explore", tmp_path_factory.mktemp("explore"), INCLUDE_ROOT, "-O1")


def test_nobody_fails(explore: Path) -> None:
    """1 to 8 ranks, 1 to 3 CTAs, random loads and orders: every tile once, y right, no race, no wait that expires."""
    seen = totals(explore, "calm", 0, 1000)
    assert seen["launches"] > 8000 and seen["records"] == 0


@pytest.mark.parametrize("ranks", [16, 32, 64])
def test_many_ranks(explore: Path, ranks: int) -> None:
    assert totals(explore, "calm", 0, 3, ranks)["launches"] == 3 * 2 * ranks
    assert totals(explore, "dies", 0, 3, ranks)["records"] > 0
    assert totals(explore, "stalls", 0, 3, ranks)["launches"] > 0


def test_a_rank_dies_anywhere(explore: Path) -> None:
    """The others leave in time, y right or NaN, each with a record that names the dead rank."""
    seen = totals(explore, "dies", 0, 1000)
    assert seen["records"] > 2000 and 500 < seen["first-hand"] < seen["records"]


def test_a_rank_stops_for_a_while(explore: Path) -> None:
    """Shorter than the limit: nothing happens. Longer: records that name it; after reset() all is right again."""
    seen = totals(explore, "stalls", 0, 700)
    assert seen["resets"] > 300 and seen["records"] > 1200


def test_threads_under_sanitizer(tmp_path: Path) -> None:
    threads = compile_("threads", tmp_path, INCLUDE_ROOT, "-O1", "-g", "-fsanitize=thread")
    done = run(threads, 4, 2, 3, 4)
    assert done.returncode == 0 and "48 launches" in done.stdout, done.stdout + done.stderr


@dataclass(frozen=True)
class Fault:
    """A change of one place in a header (or in the roles of the test) that the named run has to find."""

    what: str
    file: str
    old: str
    new: str
    kind: str = "calm"
    found: str = ""  # in what the run prints
    first: int = 0  # seed of 300: the rare are found late


WAITS, PROTOCOL, ORDER = "waits.cuh", "protocol.cuh", "order.cuh"
ROLES, SORTING, WORLD = MODEL = "roles.hpp", "sorting.hpp", "world.hpp"
FAULTS = [
    Fault("flags without a fence", PROTOCOL, "    w.mem.fence_system();  // with", "    // with", found="race"),
    Fault(
        "CTAs counted without their fence",
        PROTOCOL,
        "    mem.fence_system();\n    mem.add_relaxed",
        "    mem.add_relaxed",
        found="race",
    ),
    Fault(
        "the barrier opens relaxed",
        PROTOCOL,
        "w.mem.store_release(all, w.epoch + 1);",
        "if (phase == Phase::kGrid) w.mem.store_relaxed(all, w.epoch + 1); else w.mem.store_release(all, w.epoch + 1);",
        found="race",
    ),
    Fault(
        "a header of few tokens without a fence",
        PROTOCOL,
        "    w.mem.fence_system();\n    w.mem.store_relaxed_system(reinterpret_cast<u32*>(w.bases[owner]",
        "    w.mem.store_relaxed_system(reinterpret_cast<u32*>(w.bases[owner]",
        found="race",
    ),
    Fault(
        "counters of the launch before",
        SORTING,
        "for (const Field f : {kTilesDone, kCopied, kCastsDone})",
        "for (const Field f : {kTilesDone, kCastsDone})",
    ),
    Fault(
        "counters cleared while others count",
        SORTING,
        "const u32 next = (w.epoch + 1) % 2;",
        "const u32 next = w.epoch % 2;",
    ),
    Fault(
        "one CTA speaks for all",
        PROTOCOL,
        "if (w.mem.add(counter, 1) != ctas - 1) return;",
        "if (w.mem.add(counter, 1) != 0) return;",
    ),
    Fault(
        "a tile counted relaxed", PROTOCOL, "mem.add_release(done, 1)", "mem.add_relaxed_system(done, 1)", found="race"
    ),
    Fault(
        "rows awaited but for the last",
        PROTOCOL,
        "w.mem.load(targets + at), Phase",
        "w.mem.load(targets + at) - 1, Phase",
    ),
    Fault(
        "rows looked for but for the last",
        PROTOCOL,
        "w.mem.load(targets + at));",
        "w.mem.load(targets + at) - 1);",
    ),
    Fault("one source's rows taken for all", ROLES, "complete += pairs / W.R;", "complete += pairs;"),
    Fault(
        "rows that are seen acquired on this device only",
        PROTOCOL,
        "return w.template reached<true>(arrived",
        "return w.template reached<false>(arrived",
        found="race",
    ),
    Fault(
        "tiles awaited but for one",
        PROTOCOL,
        "tiles_done + block, tiles, Phase",
        "tiles_done + block, tiles - 1, Phase",
    ),
    Fault("headers of one call before", PROTOCOL, "w.epoch + 1, Phase::kHeader", "w.epoch, Phase::kHeader"),
    Fault(
        "a flag of another rank acquired on this device only",
        WAITS,
        "return mem.load_acquire_system(word);",
        "return mem.load_acquire(word);",
        found="race",
    ),
    Fault(
        "down before up",
        ORDER,
        "table.block_end[leader(a, active)] * up_tiles + begin * down_tiles",
        "table.block_begin(leader(a, active)) * up_tiles + begin * down_tiles",
    ),
    Fault(
        "copies awaited but for one group",
        PROTOCOL,
        "copied + block, groups, Phase",
        "copied + block, groups - 1, Phase",
    ),
    Fault(
        "a block copied over one that is still read",
        ROLES,
        "if (block >= W.ring) comm::await_tiles",
        "if (block >= 1000) comm::await_tiles",
        found="race",
    ),
    Fault(
        "a copy counted before it is made",
        ROLES,
        "            if (x.w.aborted()) return;\n            for (u32 r",
        "            if (x.w.aborted()) return;\n"
        "            comm::count_tile(x.mem, x.counters(kCopied) + block);\n            for (u32 r",
        found="race",
    ),
    Fault(
        "activations cast before all tiles are there",
        ROLES,
        "comm::await_tiles(x.w, x.counters(kTilesDone), g.block, W.U);",
        "comm::await_tiles(x.w, x.counters(kTilesDone), g.block, W.U - 1);",
        found="race",
    ),
    Fault("casts not awaited", ROLES, "if (t.down && !W.casts) {", "if (t.down) {", found="race"),
    Fault(
        "casts further behind than their down units",
        ORDER,
        "table.block_end[cast] + lag",
        "table.block_end[cast] + lag + 100",
        found="a wait expired",
        first=300,
    ),
    Fault(
        "down units among the up units that all come first",
        ORDER,
        "if (ups_first || table",
        "if (table",
        found="a down unit before the last up unit",
    ),
    Fault(
        "down units among up units of experts with one block each",
        ORDER,
        "ups_first || table.block_end[active - 1] == active",
        "ups_first",
        found="a down unit before the last up unit",
    ),
    Fault("one block of an expert cast for all", ORDER, "+ row / kBlockRows;", "+ !casts * (row / kBlockRows);"),
    Fault(
        "a ring smaller than a band",
        WORLD,
        "least = kBand + r.below(2)",
        "least = 1",
        found="a wait expired",
    ),
    Fault(
        "a tile counted before the math warps have settled it",
        ROLES,
        "            await(kSettled + i % 2, i / 2 + 1);\n",
        "",
    ),
    Fault(
        "the meeting behind rows opens relaxed",
        PROTOCOL,
        "w.mem.store_release(all, w.epoch + 1);",
        "if (phase == Phase::kKept) w.mem.store_relaxed(all, w.epoch + 1); else w.mem.store_release(all, w.epoch + 1);",
        found="race",
    ),
    Fault(
        "rows added up behind the first CTA's",
        PROTOCOL,
        "if (w.mem.add(come, 1) == ctas - 1) {",
        "if (w.mem.add(come, 1) == (phase == Phase::kKept ? 0 : ctas - 1)) {",
    ),
    Fault(
        "rows of the call before added up",
        PROTOCOL,
        "all, w.epoch + 1, phase",
        "all, w.epoch + (phase != Phase::kKept), phase",
    ),
    Fault(
        "partial sums announced before they are sent",
        ROLES,
        "            send_sums();\n            meet_cta();\n",
        "            send_sums();\n",
    ),
    Fault(
        "no patience with CTAs that wait for rows",
        WAITS,
        "phase == Phase::kKept || ",
        "",
        "dies",
        "wrong rank",
    ),
    Fault(
        "a void launch announces its results",
        PROTOCOL,
        "    if (w.aborted()) return;\n    w.mem.fence_system();\n    if",
        "    w.mem.fence_system();\n    if",
        "stalls",
        "y is wrong",
    ),
    Fault(
        "no patience with those who wait for a third",
        WAITS,
        "limit += limit_ns / 4;",
        ";",
        "dies",
        "wrong rank",
    ),
    Fault(
        "no patience with a rank that awaits headers before it pushes",
        WAITS,
        "limit += limit_ns / 8;",
        ";",
        "dies",
        "wrong rank",
    ),
    Fault(
        "the others are not told",
        WAITS,
        "if (peer != rank) mem.store",
        "if (peer == rank) mem.store",
        "dies",
        "wrong rank|left late",
    ),
    Fault(
        "no record of what others found",
        WAITS,
        "if (mem.exchange(&alarm(rank)->reported, 1) != 0) return;",
        "if (r.phase == 6) return;",
        "dies",
        "without a record",
    ),
    Fault(
        "no patience with a rank still in the call before",
        WAITS,
        "over = false, limit += limit_ns / 2;",
        "{}",
        "dies",
        "wrong rank",
        600,
    ),
]


def standard_headers(root: Path) -> Path:
    """What the tests include of the standard library, compiled once: most of the time that a fault takes."""
    header = root / "standard.hpp"
    names = ["ucontext.h", "algorithm", "atomic", "chrono", "functional", "memory", "thread", "unordered_map", "vector"]
    header.write_text("".join(f"#include <{name}>\n" for name in names), encoding="utf-8")
    command = ["g++", "-std=c++20", "-w", "-O0", str(header), "-o", f"{header}.gch"]
    assert subprocess.run(command, check=False).returncode == 0
    return header


def planted(fault: Fault, root: Path, header: Path) -> str:
    """What the run says of headers with the fault, empty if it finds nothing."""
    folder = root / re.sub(r"\W+", "-", fault.what)
    shutil.copytree(INCLUDE_ROOT / COMM, folder / COMM)
    shutil.copytree(INCLUDE_ROOT / "megamoe/common", folder / "megamoe/common")
    shutil.copytree(HERE / "protocol", folder / "tests/protocol")
    shutil.copy(HERE / "host_memory.hpp", folder / "tests")
    path = folder / (f"tests/protocol/{fault.file}" if fault.file in MODEL else COMM / fault.file)
    text = path.read_text(encoding="utf-8")
    assert text.count(fault.old) == 1, f"{fault.what}: stands {text.count(fault.old)} times in {fault.file}"
    path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    source = folder / "tests/protocol/explore.cpp"
    command = ["g++", "-std=c++20", "-w", "-O0", "-include", str(header), f"-I{folder}", str(source)]
    done = subprocess.run([*command, "-o", str(folder / "explore")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    done = run(folder / "explore", fault.kind, fault.first, 300)
    return done.stdout if done.returncode == 1 else ""


def test_planted_faults_are_found(tmp_path: Path) -> None:
    header = standard_headers(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(lambda fault: planted(fault, tmp_path, header), FAULTS))
    for fault, words in zip(FAULTS, said, strict=True):
        assert words.startswith("FAILED") and re.search(fault.found, words), f"{fault.what}: {words or 'not found'}"


@pytest.mark.parametrize(
    ("releasing", "relaxed"),
    [
        (r"    w\.mem\.fence_system\(\);.*\n", ""),  # flags are then relaxed stores
        (r"mem\.add_release\(done, 1\)", "mem.add_relaxed_system(done, 1)"),
    ],
    ids=["flags", "tiles"],
)
def test_sanitizer_sees_what_is_relaxed(releasing: str, relaxed: str, tmp_path: Path) -> None:
    """The test of the test."""
    shutil.copytree(INCLUDE_ROOT / COMM, tmp_path / COMM)
    shutil.copytree(INCLUDE_ROOT / "megamoe/common", tmp_path / "megamoe/common")
    path = tmp_path / COMM / PROTOCOL
    text, count = re.subn(releasing, relaxed, path.read_text(encoding="utf-8"))
    assert count == (3 if relaxed == "" else 1)
    path.write_text(text, encoding="utf-8")
    threads = compile_("threads", tmp_path, tmp_path, "-O1", "-g", "-fsanitize=thread")
    done = run(threads, 4, 2, 3, 4)
    assert done.returncode != 0 and "data race" in done.stderr, done.stdout + done.stderr
