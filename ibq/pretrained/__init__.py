"""Released checkpoints, feature networks and their pretrained weights."""
