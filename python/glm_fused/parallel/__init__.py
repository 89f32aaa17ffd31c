"""Several processes that run one model together: how they meet, agree and end."""
