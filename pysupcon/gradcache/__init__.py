"""GradCache: the gradient of one large batch with the encoder's memory of a small one.

A contrastive loss needs the embeddings of the whole batch at once, but not the activations of the encoder.
GradCache (Gao et al. 2021, arXiv 2101.06983) embeds the batch chunk by chunk without a graph, computes the
gradient of the loss with respect to the embeddings, runs each chunk again with a graph, and backpropagates
its part of that gradient. The result is the gradient of the whole batch, at the cost of one more forward.

>>> import torch, pysupcon
>>> model, criterion = torch.nn.Linear(8, 4), pysupcon.SupConLoss(normalize=True)
>>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
>>> grad_cache = pysupcon.GradCache(model, chunk_size=64)
>>> for images, labels in [(torch.randn(256, 8), torch.arange(256) % 10)]:
...     optimizer.zero_grad()
...     loss = grad_cache(images, lambda embeddings: criterion(embeddings, labels))  # and its backward
...     optimizer.step()

Several models (two towers) are given as a list, each with its own chunk size:

    grad_cache = GradCache([image_encoder, text_encoder], chunk_size=[32, 256])
    loss = grad_cache([images, tokens], lambda image_embeddings, text_embeddings: ...)

One step compared with ``criterion(model(images), labels).backward()``:

Inputs
    are copied chunk by chunk (memory of one more chunk), so a model may change them in place.
Random numbers
    of torch (dropout, random augmentation inside the model) are replayed, on all devices of the model and of
    the inputs. After the step the generators continue from the end of the first pass. A ``torch.Generator``
    that is an attribute of a module is replayed, too. Random numbers of Python and NumPy are not replayed. If
    a model uses them, or keeps state outside its buffers, the passes of the first step differ, and a warning
    says so.
BatchNorm
    in training mode normalises each chunk by its own mean and variance, as in any gradient accumulation, so
    the step is not that of the whole batch. Running statistics are updated once per chunk, not twice; all
    other buffers are replayed. With SyncBatchNorm all processes must have the same number of chunks.
DistributedDataParallel
    synchronises gradients once, in the backward of the last chunk, and broadcasts buffers once, before the
    first chunk. The loss may gather (``gather=True``). Batch sizes and numbers of chunks may differ between
    processes. Parameters of a DDP module must be used in its forward, not in the loss. With
    ``static_graph=True`` the first step has one more forward and backward, of zero gradients, that
    synchronises.
Mixed precision
    works if the call is inside ``torch.autocast``, like a forward. Pass a ``GradScaler`` as ``scaler`` (with
    Accelerate: ``accelerator.scaler``, and do not call ``accelerator.backward``).
Parameters of the loss
    (a learnable temperature) get their gradient in the same call.

Modules, in reading order:

    chunks   splits the inputs into samples, and copies chunks
    replay   random states, buffers and autocast of the first pass
    ddp      synchronisation of DistributedDataParallel
    towers   the models with their options, checked
    cache    GradCache, the two passes
"""

from pysupcon.gradcache.cache import GradCache

__all__ = ["GradCache"]
