"""Long texts without scaling: a document in pooled parts (`facts`), and endless texts (`endless`)."""
