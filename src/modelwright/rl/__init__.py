"""Alignment by reinforcement: PPO over tokens or macro actions."""
