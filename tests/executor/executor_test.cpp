#include "support/support.hpp"
import cobuild.executor;
BOOST_AUTO_TEST_CASE(x){}
