"""The reward model: model, ranking losses, calibration and scoring."""
