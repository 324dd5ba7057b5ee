"""What the maps to a mixture share: stock classes and routers."""
