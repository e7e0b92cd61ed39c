"""What a checkpoint should be, byte for byte, and where it is not. Reads; never writes, never runs a pickle's code."""
