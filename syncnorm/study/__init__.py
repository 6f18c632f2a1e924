"""Questions about normalisation, each answered by many training runs on real data."""
