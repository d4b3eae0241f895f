"""Records of finished stages -> tables -> pages."""
