"""One checkpoint format for all strategies: written in the background, committed by the coordinator, verified."""
