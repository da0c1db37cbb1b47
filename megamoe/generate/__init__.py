"""Text generation: requests, a batch scheduler, bookkeeping of key-value caches, the loop. See docs/generation.md."""
