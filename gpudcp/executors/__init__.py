"""Fulfil chunk plans: pack and write, read and unpack. An executor never decides what goes where."""
