"""Cached activations: manifest, writer, reader."""
