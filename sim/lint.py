def check(p):
    return []
