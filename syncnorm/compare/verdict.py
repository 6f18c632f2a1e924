def verdict(c):
    return []
