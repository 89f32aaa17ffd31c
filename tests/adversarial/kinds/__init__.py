"""The kinds of fault; tests/adversarial/README.md says what a module of one holds."""
