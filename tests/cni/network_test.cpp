#include "support/support.hpp"
import cobuild.base;
import cobuild.async;
import cobuild.process;
import cobuild.cni;
