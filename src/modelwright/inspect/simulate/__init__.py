"""Simulators of training: recorded runs, features of examples, roll-outs."""
