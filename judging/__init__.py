"""How a model is judged: who looks at a picture, what is counted, how it is reported."""
