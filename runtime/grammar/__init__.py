"""Constrained generation: grammars are compiled beside the loop, kept by content, and turned into masks over tokens."""
