"""From rows to batches: sources, tokenization, the plan of batches, streams and the demo world."""
