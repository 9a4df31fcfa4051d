// Ctrl-C during a long kernel.
#pragma once

namespace pysupcon {

// Runs Python's handlers of pending signals. If one raises, such as KeyboardInterrupt, that exception is
// thrown. Does nothing in threads other than Python's main thread.
void raise_pending_signal();

}  // namespace pysupcon
