def check(p): return []
