"""Three claims about the mechanism, each as a statement, a bound and a numerical check.

`complexity` counts operations, bytes and parameters; `expressiveness` says what a gate lets a head compute that no
fixed matrix can; `convergence` bounds scores and gradients, and says what follows for gradient descent.

The paper's theorems are not known here word for word: only its abstract, the content of its figure and its equations
are. A docstring therefore names the source of its statement. "Derived here" means that the site's page has the proof;
"second-hand" means that a reader of the paper reports it.
"""
