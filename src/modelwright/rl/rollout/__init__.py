"""Roll-outs: prompts, sampled responses, their rewards and values."""
