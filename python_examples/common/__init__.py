"""What the example scripts share: command line, run folder, data, models, training loop."""
