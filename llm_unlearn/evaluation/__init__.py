"""What a checkpoint still knows."""
