"""Programs that a model wrote: run shut in, judged, and handed over to the official tools."""
