"""Data that models write: who writes it, how replies are read, how answers are graded and checked."""
