"""Several devices: workers that attack the points of a match, on this machine or on a cluster."""
