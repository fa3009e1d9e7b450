"""What a training step costs on devices that need not be present: `unipool plan mesh=v5p_64`."""
