"""Where the time of a step goes: the stages of a model measured one by one, beside the whole."""
