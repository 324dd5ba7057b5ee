"""The few architectures that no stock class can hold."""
