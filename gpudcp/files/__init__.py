"""How bytes reach storage and come back, and how a checkpoint becomes visible. Knows no tensor and no plan."""
