"""The tips that the model knows by heart: a topic, then six lines of `tip | why`."""

from __future__ import annotations

_TEXT = """
# staying healthy
Drink enough water | your body works best when it is not thirsty
Eat fruit and vegetables every day | they give you vitamins and fibre
Sleep eight hours a night | rest repairs your body and your mind
Walk for thirty minutes a day | moving keeps your heart strong
Wash your hands often | clean hands keep many illnesses away
Eat less sugar | too much sugar harms your teeth and your weight
# studying
Make a plan for the week | a plan shows you what to do next
Take a short break every hour | a rested mind learns faster
Test yourself often | recalling a fact makes it stay
Study in a quiet place | noise takes your attention away
Explain the topic to a friend | teaching shows what you do not yet understand
Put your phone away | messages break your attention
# sleeping well
Go to bed at the same time | your body likes a steady rhythm
Keep the room dark and cool | darkness and cool air help you fall asleep
Avoid coffee in the evening | caffeine keeps you awake for hours
Read a book before bed | reading calms your thoughts
Turn off screens early | bright light delays your sleep
Eat a light dinner | a full stomach makes it hard to rest
# saving money
Write down what you spend | you see where the money goes
Cook at home | home meals cost less than restaurants
Make a list before shopping | a list stops you from buying too much
Compare prices | the same thing is often cheaper elsewhere
Save a little every month | small sums grow over the years
Cancel what you do not use | unused services still cost money
# travelling
Pack light | a small bag is easy to carry
Learn a few local words | people are glad when you greet them
Keep a copy of your passport | a copy helps when the original is lost
Book your room early | early rooms are cheaper and better
Try the local food | food tells you a lot about a place
Carry some cash | not every shop takes cards
# gardening
Water plants in the morning | less water is lost to the heat
Choose plants that suit your soil | they grow well without much help
Pull weeds early | small weeds come out easily
Add compost in spring | compost feeds the plants for months
Give plants enough light | most flowers need the sun
Cut off dead leaves | new leaves get more strength
# cooking
Taste while you cook | you can still correct the salt
Read the recipe first | you will not be surprised in the middle
Use a sharp knife | a sharp knife is safer and faster
Prepare everything before you start | then you never have to hurry
Let meat rest | it keeps its juice
Use fresh herbs | fresh herbs add a lot of flavour
# writing
Write a little every day | practice makes the words come easier
Use short sentences | short sentences are easy to follow
Read your text aloud | your ear finds what your eye misses
Cut words you do not need | a shorter text is clearer
Start with an outline | an outline keeps your thoughts in order
Ask a friend to read it | a fresh reader sees the gaps
# job interviews
Arrive ten minutes early | you have time to calm down
Learn about the company | good questions show your interest
Prepare a few examples | stories show what you can do
Dress neatly | a neat look makes a good first impression
Listen carefully | you can only answer what you have understood
Ask a question at the end | it shows that you want the job
# learning a language
Speak from the first day | speaking makes you bold
Learn ten new words a day | a few words a day become many
Watch films in that language | you get used to the sound
Keep a notebook of mistakes | you will not make them twice
Find a partner to talk to | talking together is fun and useful
Read simple books | simple stories teach common words
# running
Start slowly | your legs need time to get used to it
Wear good shoes | good shoes protect your knees
Warm up first | warm muscles are hurt less often
Rest one day between runs | muscles grow while you rest
Run with a friend | company keeps you going
Set a small goal | reaching a goal gives you joy
# public speaking
Practise in front of a mirror | you see how others see you
Speak slowly | listeners need time to follow
Look at the audience | people listen when you look at them
Begin with a story | a story wakes up the audience
Breathe deeply before you start | deep breaths calm your nerves
Use few slides | people should listen and not read
# making friends
Smile and say hello | a smile opens the door
Ask questions | people like to talk about what they love
Join a club | shared hobbies bring people together
Remember names | a name shows that you care
Keep your promises | friends must be able to trust you
Be a good listener | listening makes others feel valued
# working from home
Start at the same time every day | a routine helps you begin
Have a desk for work only | the place tells your mind to work
Take a real lunch break | a pause gives you new energy
Get dressed for work | clothes change how you feel
Talk to your colleagues | a short talk keeps the team together
Stop work on time | your evening belongs to you
# managing time
Do the hardest task first | your mind is fresh in the morning
Make a short list | a short list can be finished
Say no sometimes | you cannot do everything
Do one thing at a time | switching costs time
Set a time limit | a limit keeps a task small
Plan the next day in the evening | you can start at once in the morning
# staying calm
Breathe slowly | slow breaths slow your heart
Go for a walk | moving takes the pressure away
Talk to someone you trust | a worry shared is a smaller worry
Write down your worries | on paper they look smaller
Listen to quiet music | soft music relaxes you
Take a break from the news | bad news all day makes you tense
# caring for a dog
Walk the dog twice a day | dogs need to move
Give it fresh water | a thirsty dog gets ill
Train with small treats | rewards teach faster than anger
Visit the vet once a year | the vet finds problems early
Brush its coat | brushing keeps the skin healthy
Play with it | play makes the dog happy and clever
# taking photos
Keep the light behind you | the face is bright then
Hold the camera still | a still camera gives a sharp picture
Get close | details make a picture strong
Look for simple backgrounds | nothing then draws the eye away
Take many pictures | one of them will be the best
Shoot in the early morning | morning light is soft
# cycling
Wear a helmet | it protects your head in a fall
Check your brakes | good brakes save lives
Use lights at night | drivers must be able to see you
Pump up the tyres | full tyres roll easily
Signal before you turn | others need to know where you go
Lock your bike | a locked bike is still there later
# cleaning the house
Clean a little every day | the work never piles up
Start with one room | one finished room feels good
Open the windows | fresh air removes dust and smells
Give away what you do not need | fewer things need less cleaning
Dust before you sweep | the dust falls on the floor
Put things back at once | order stays when every thing has a place
# reading more
Always carry a book | you can read while you wait
Read before you sleep | a few pages a night become many books
Join a library | books are free there
Stop reading what bores you | a good book makes you read on
Set a goal for the year | a goal keeps you reading
Talk about books | friends give you new ideas
# learning to program
Write small programs | small programs teach one thing at a time
Read the error message | it often says what is wrong
Test every change | you find mistakes while they are small
Read code of others | you learn new ways to do things
Use clear names | clear names explain the code
Ask for help | a second pair of eyes sees more
# protecting nature
Use less plastic | plastic stays in the sea for many years
Take the bus or the bike | fewer cars mean cleaner air
Turn off the lights | unused light wastes energy
Plant a tree | trees clean the air
Buy food from near you | short ways need less fuel
Repair broken things | repaired things need not be thrown away
# playing chess
Control the centre | pieces in the centre reach many squares
Protect your king early | a safe king lets you attack
Think before every move | one careless move can lose the game
Do not move the queen too soon | she can be chased around
Learn simple endings | many games are decided at the end
Look at what your opponent wants | every move has a reason
# giving gifts
Listen to what people wish for | they often tell you without knowing
Set a budget | a good gift need not be expensive
Write a card | kind words last longer than things
Wrap it nicely | the joy begins with the paper
Give your time | time together is the best gift
Plan early | you find better things when you do not hurry
# hiking
Check the weather | storms are dangerous in the hills
Tell someone your route | they can send help
Take enough water | you lose a lot of water when you climb
Wear strong boots | boots hold your feet on stones
Start early in the day | you will be back before dark
Carry a map | phones do not work everywhere
"""


def _parse() -> dict[str, tuple[tuple[str, str], ...]]:
    topics: dict[str, tuple[tuple[str, str], ...]] = {}
    for block in _TEXT.split("\n# ")[1:]:
        topic, *lines = block.strip().splitlines()
        halves = (line.split(" | ") for line in lines)
        topics[topic] = tuple((tip, why) for tip, why in halves)
    return topics


TIPS = _parse()
EXPLAINED = {tip: f"{tip}, because {why}." for tips in TIPS.values() for tip, why in tips}
