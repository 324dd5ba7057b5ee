"""The neurons of feed-forward parts as experts: permuted, grouped, executed in part."""
