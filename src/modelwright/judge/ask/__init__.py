"""How a judge is asked: prompts, verdicts, recorded runs. The models behind it are in core/ask."""
