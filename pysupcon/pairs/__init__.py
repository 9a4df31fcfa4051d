"""From embeddings to statistics per anchor: everything between the arguments of a loss and its formula.

In reading order; a module imports only modules listed above it:

    modes           eager, traced or transformed: the mode in which torch runs a loss
    normalize       L2 normalisation of rows
    checks          checks of the arguments that users pass
    ops             the compiled operators: contracts, fakes, what this build supports
    tiles           tiles of pairs in label order, and checks of operator arguments
    tiled           the operators in pure PyTorch
    statistics      which statistics a loss needs; forward and gradients by the operators of a backend
    known_answers   the known-answer test of operators
    kernel_check    whether the CUDA kernels may be used on a device
    traced          the same during a trace of torch.compile
    backends        the choice of a backend, and the report on all of them
    custom_op       the differentiable step as one custom operator, for tracing and transforms
    autograd        the differentiable step: rows to statistics per anchor
    pairing         positives and instances: ids or a mask to index arguments and counts
    global_batch    the batch of all processes, and the protocols of communication
    agreement       values that must be the same on all processes
    problem         the arguments of a loss, checked and laid out
    metrics         top-1 accuracy and mean similarities, without gradient
    gathered        the differentiable step with the rows of several processes as candidates
    rows            from statistics to losses per anchor, and from these to one number
    reference       all losses on the dense matrix of similarities, for tests
"""
