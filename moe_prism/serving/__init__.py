"""OpenAI-compatible HTTP server: requests with quality floors and objectives, metrics, a web page; drives an engine."""
