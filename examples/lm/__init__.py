"""The parts of the demo: text, model, training loop, bandwidth table, chart."""
