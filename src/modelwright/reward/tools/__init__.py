"""Tools that a reward model may call, the traces of such calls, and recorded traces to replay them against."""
