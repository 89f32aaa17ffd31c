"""What a machine does with layers of GLM-5.2's shapes: for the owner of a Mac to run and send."""
