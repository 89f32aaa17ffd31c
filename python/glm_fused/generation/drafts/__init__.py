"""Drafts: tokens that are guessed ahead, which the model then takes together."""
