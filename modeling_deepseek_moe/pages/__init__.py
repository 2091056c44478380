"""Reports as a page each: the frame, the style, texts, tables and plots that those of trainings and evaluations share."""
