"""How much memory a run takes on each device, known before any weight is loaded, and what to change."""
