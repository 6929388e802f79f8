"""What the closed-form attacks (R-GAP, H-GAP, SPEAR) solve: the start at the top, layer by layer, sparse columns."""
