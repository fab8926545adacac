"""Model families of vtok: one file a family, found through the entry-point group ``vtok.adapters``."""
