"""What a traced call of the mega-kernel (megamoe/mega/trace.py) shows: one clock, shares, Perfetto, a figure."""
