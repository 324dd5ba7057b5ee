"""What a person sees: pages, plots, progress."""
