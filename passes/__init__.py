"""Graph to graph: folds, smoothing, Q/DQ insertion, lowering."""
