"""What a training step costs on devices that need not be present: `python train.py mesh=v5p_64 mode=plan`."""
