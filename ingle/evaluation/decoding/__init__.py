"""From the logits of task heads to predictions: labels, tags with characters, answers, fills of masks."""
